"""Series trunks and forecast heads: a long data frame in, quantiles, a backtest and an explanation out."""

from manyheads.forecast.backtest import Backtest, backtest
from manyheads.forecast.baselines.linear import LinearForecaster
from manyheads.forecast.baselines.seasonal_naive import SeasonalNaive
from manyheads.forecast.baselines.statistics import ARIMA, ETS, Theta
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.next_patch import NextPatchForecaster
from manyheads.forecast.ensemble import Ensemble
from manyheads.forecast.explaining import ForecastExplanation, explain_forecast
from manyheads.forecast.fev import fev_predictions
from manyheads.forecast.fields.aardvark import Aardvark
from manyheads.forecast.fields.prithvi import PrithviWxC
from manyheads.forecast.fields.set_conv import Observations
from manyheads.forecast.language.autotimes import AutoTimes
from manyheads.forecast.language.smetimes import SMETimes
from manyheads.forecast.language.time_llm import TimeLLM
from manyheads.forecast.mixers.clustering import ClusteredForecaster, clustered
from manyheads.forecast.mixers.olinear import OLinear
from manyheads.forecast.mixers.softs import Softs
from manyheads.forecast.pipelines.longitudinal import score_longitudinal
from manyheads.forecast.pipelines.scientist import Scientist
from manyheads.forecast.representations.tspulse import TSPulse
from manyheads.forecast.running import ForecastRun, run_forecast
from manyheads.forecast.sensors.hiss import SensorRegressor
from manyheads.forecast.sensors.mhac import Mhac
from manyheads.forecast.transformers.chronos2 import Chronos2
from manyheads.forecast.transformers.gpht import GPHT
from manyheads.forecast.transformers.patchtst import PatchTST

__all__ = [
    "ARIMA",
    "ETS",
    "GPHT",
    "Aardvark",
    "AutoTimes",
    "Backtest",
    "Chronos2",
    "ClusteredForecaster",
    "Ensemble",
    "ForecastExplanation",
    "ForecastRun",
    "Forecaster",
    "LinearForecaster",
    "Mhac",
    "NetworkForecaster",
    "NextPatchForecaster",
    "OLinear",
    "Observations",
    "PatchTST",
    "PrithviWxC",
    "SMETimes",
    "Scientist",
    "SeasonalNaive",
    "SensorRegressor",
    "Softs",
    "TSPulse",
    "Theta",
    "TimeLLM",
    "backtest",
    "clustered",
    "explain_forecast",
    "fev_predictions",
    "run_forecast",
    "score_longitudinal",
]
