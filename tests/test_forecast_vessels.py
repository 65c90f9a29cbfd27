"""Tracks of vessels: a date line that does not matter, jumps that are dropped, a backward pass that sees history only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.errors import InputError
from manyheads.evaluation.experiment import experiment
from manyheads.forecast.sensors.tracks import (
    future_of,
    globe,
    history_of,
    median_step,
    plane,
    plausible,
    tracks_of,
)
from manyheads.forecast.sensors.vessels import VesselForecaster
from manyheads.forecast.sensors.vessels_experiment import miles_off, reckoned, simulated

SMALL = {"horizon": 3, "history": 6, "width": 8, "layers": 1, "steps": 4, "rows": 16, "step": 60.0}


def straight(n=12, outliers=(), start=(10.0, 20.0)):
    """A vessel that goes north by a tenth of a nautical mile a minute."""
    latitude = start[0] + np.arange(n) / 600
    latitude[list(outliers)] += 1.0
    return pd.DataFrame({"vessel": 7, "time": 60.0 * np.arange(n), "latitude": latitude, "longitude": start[1]})


@pytest.fixture(scope="module")
def fitted():
    return VesselForecaster(**SMALL).fit(simulated(12, 0)[0])


@pytest.mark.parametrize("outliers", [(0,), (5,), (5, 6), (11,), (0, 1, 4, 11)])
def test_exactly_the_implausible_messages_are_dropped(outliers):
    track = tracks_of(straight(outliers=outliers))[7]
    assert np.flatnonzero(~plausible(track, 60.0)).tolist() == list(outliers)
    assert plausible(track, 1e6).all()


def test_a_history_and_a_future_are_even_in_time_and_say_what_was_seen():
    track = tracks_of(straight().drop(index=[7, 8, 9]))[7]
    x = history_of(track, 7, 60.0, 6)  # minutes 5 .. 10, of which 7, 8 and 9 are missing
    np.testing.assert_allclose(x[:, :2], np.stack([np.zeros(6), np.arange(-5, 1) / 10], -1), atol=1e-9)
    np.testing.assert_allclose(x[1:, 3], 0.1, atol=1e-9)
    assert x[:, 4].tolist() == [1, 1, 0, 0, 0, 1]
    np.testing.assert_allclose(x[:, 5], [0, 0, 1, 2, 1, 0], atol=1e-9)
    y = future_of(track, 5, 60.0, 7)  # minutes 6 .. 12: 8 is two minutes from any message, 12 after the last
    assert np.isfinite(y[:, 1]).tolist() == [True, True, False, True, True, True, False]
    np.testing.assert_allclose(y[[0, 1, 3, 4, 5], 1], np.array([1, 2, 4, 5, 6]) / 10, atol=1e-9)


def test_speed_and_course_are_read_where_there_are_any():
    frame = straight().assign(SOG=6.0, cog=90.0)
    x = history_of(tracks_of(frame)[7], 5, 60.0, 4)
    np.testing.assert_allclose(x[:, 7:], np.tile([6.0, 1.0, 0.0], (4, 1)), atol=1e-12)
    assert (history_of(tracks_of(straight())[7], 5, 60.0, 4)[:, 7:] == 0).all()


def test_the_plane_is_undone_across_the_date_line():
    miles = np.array([[30.0, 5.0], [-70.0, 0.0]])
    place = globe(miles, (50.0, 179.9))
    assert place[0, 1] < -179 and 177 < place[1, 1] < 180
    np.testing.assert_allclose(plane(place[:, 0], place[:, 1], (50.0, 179.9)), miles, atol=1e-9)


def test_longitude_wraps(fitted):
    frame = simulated(5, 3)[0]
    plain = fitted.predict(frame)
    for turn in (360.0, 140.0):  # 140 degrees carry other vessels over the date line
        moved = fitted.predict(frame.assign(longitude=(frame["longitude"] + turn) % 360))
        off = (moved["longitude"] - plain["longitude"] - turn + 180) % 360 - 180
        assert np.abs(off).max() < 1e-6 and np.abs(moved["latitude"] - plain["latitude"]).max() < 1e-6
        assert moved["longitude"].between(-180, 180).all()


def test_before_training_it_is_dead_reckoning_exactly():
    frame = simulated(6, 1)[0]
    made = VesselForecaster(**SMALL)
    made.step_, made.net_ = 60.0, made._built()
    found = made.predict(frame)[["latitude", "longitude"]].to_numpy().reshape(6, 3, 2)
    np.testing.assert_array_equal(found, reckoned(frame, 60.0, 3, 60.0, 3))


def test_windows_read_nothing_after_their_last_message(fitted):
    track = tracks_of(simulated(1, 2)[0])[0]
    moved = replace(track, latitude=track.latitude + 3.0 * (np.arange(len(track)) > 15))
    a, b = (history_of(one, 15, 60.0, 6) for one in (track, moved))
    np.testing.assert_array_equal(a, b)
    assert (history_of(track, 16, 60.0, 6) != history_of(moved, 16, 60.0, 6)).any()


def test_both_directions_read_the_whole_history(fitted):
    x = torch.randn(1, 6, 10, requires_grad=True)
    net = fitted.net_
    states = net.lstm(net.feed(x[..., :8]))[1][0]
    for state in (states[-2], states[-1]):  # forward, backward
        assert (torch.autograd.grad(state.sum(), x, retain_graph=True)[0][0, :, :8].abs().amax(1) > 0).all()


def test_a_track_that_is_turned_has_a_forecast_that_is_turned(fitted):
    x = np.concatenate([history_of(t, len(t) - 1, 60.0, 6)[None] for t in tracks_of(simulated(4, 5)[0]).values()])
    around = x.copy()
    for at in (0, 2):  # a quarter to the left
        around[..., at], around[..., at + 1] = -x[..., at + 1], x[..., at]
    assert (fitted._inputs(x) - fitted._inputs(around)).abs().max() < 1e-5
    north = VesselForecaster(**SMALL | {"oriented": False})
    assert (north._inputs(x) - north._inputs(around)).abs().max() > 0.1


def test_vessels_are_split_whole_and_other_vessels_change_no_forecast(fitted, monkeypatch):
    frame = simulated(10, 4)[0]
    parts = []
    windows = VesselForecaster._windows
    monkeypatch.setattr(VesselForecaster, "_windows", lambda self, t: (parts.append(t), windows(self, t))[1])
    VesselForecaster(**SMALL | {"held": 0.3, "steps": 1}).fit(frame)
    assert [len(part) for part in parts] == [7, 3]
    assert not {id(t) for t in parts[0]} & {id(t) for t in parts[1]}
    alone = fitted.predict(frame[frame["mmsi"] == 4])
    together = fitted.predict(frame.sample(frac=1, random_state=0))
    np.testing.assert_allclose(alone["latitude"], together.loc[together["mmsi"] == 4, "latitude"], atol=1e-7)


def test_times_and_names_come_back_as_they_were_given(fitted):
    frame = straight()
    for times in (pd.to_datetime(frame["time"], unit="s"), pd.to_datetime(frame["time"], unit="s", utc=True)):
        found = fitted.predict(frame.assign(time=times).rename(columns={"vessel": "MMSI", "time": "BaseDateTime"}), 2)
        assert list(found.columns) == ["MMSI", "BaseDateTime", "latitude", "longitude"]
        assert found["BaseDateTime"].tolist() == [times.iloc[-1] + pd.Timedelta(minutes=k) for k in (1, 2)]
    assert fitted.predict(frame, 1)["time"].tolist() == [12 * 60.0]
    one = fitted.predict(frame.iloc[:1])
    assert len(one) == 3 and np.isfinite(one[["latitude", "longitude"]]).all().all()


def test_a_saved_one_forecasts_the_same_bits(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    frame = simulated(5, 6)[0]
    pd.testing.assert_frame_equal(VesselForecaster.load(tmp_path / "saved").predict(frame), fitted.predict(frame))


def test_what_cannot_be_read_is_refused(fitted):
    with pytest.raises(InputError, match="no column of longitude"):
        tracks_of(straight().drop(columns="longitude"))
    with pytest.raises(InputError, match="beyond a pole"):
        tracks_of(straight(start=(95.0, 0.0)))
    with pytest.raises(InputError, match="no message"):
        tracks_of(straight().assign(latitude=np.nan))
    with pytest.raises(InputError, match="is no number"):
        tracks_of(straight().assign(speed="fast"))
    with pytest.raises(InputError, match="neither numbers of seconds nor dates"):
        tracks_of(straight().assign(time="soon"))
    with pytest.raises(InputError, match="no vessel has two messages"):
        median_step(tracks_of(straight(1)))
    with pytest.raises(InputError, match="give longer tracks"):
        VesselForecaster(**SMALL).fit(straight(2))
    with pytest.raises(InputError, match="not fitted"):
        VesselForecaster().predict(straight())
    with pytest.raises(InputError, match="n is 4"):
        fitted.predict(straight(), 4)
    with pytest.raises(InputError, match="fastest is 0"):
        VesselForecaster(fastest=0)


def test_simulated_truth_goes_on_where_the_messages_end():
    frame, truth = simulated(20, 9, turning=False)
    assert np.median(miles_off(reckoned(frame, 60.0, 6, 60.0, 6), truth)) < 0.05
    rows = frame.groupby("mmsi").size()
    assert 28 < rows.mean() < 37


@pytest.mark.slow
def test_turning_vessels_are_forecast_better_than_by_dead_reckoning_and_a_plain_lstm():
    tried = experiment("forecast", "vessels").run(seeds=(0, 1))
    assert [one.answer for one in tried.verdicts[:2]] == ["held", "held"]
