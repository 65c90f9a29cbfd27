"""The same model for less: smaller caches, fewer heads, other heads; and what it cost."""

from manyheads.shrink.cache.attending import Compression
from manyheads.shrink.cache.duo_attention import DuoAttention
from manyheads.shrink.cache.duo_gates import duo_gates
from manyheads.shrink.cache.duo_scores import duo_scores
from manyheads.shrink.cache.haystacks import Haystack, haystacks, needle_recall
from manyheads.shrink.cache.kvpress import from_kvpress
from manyheads.shrink.cache.press import CacheCall, Press, ScorePress
from manyheads.shrink.cache.ragged import RaggedCache, Window
from manyheads.shrink.cache.snapkv import AdaKV, SnapKV
from manyheads.shrink.cache.streaming import Streaming
from manyheads.shrink.measuring import Cost, Shrunk, measure
from manyheads.shrink.online.continual import ContinualEncoder
from manyheads.shrink.online.kv_prediction import KVPrediction, KVPredictor
from manyheads.shrink.positions.carope import CARoPE
from manyheads.shrink.positions.complexformer import ComplexFormer
from manyheads.shrink.positions.long_heads import LongHeads
from manyheads.shrink.recovery import Recovery, recover
from manyheads.shrink.saving import load_press, save_press
from manyheads.shrink.shrinking import ShrinkWay, shrink_way, shrink_ways, shrinks
from manyheads.shrink.weights.amp import AMP
from manyheads.shrink.weights.dha import DHA
from manyheads.shrink.weights.moh import MoH
from manyheads.shrink.weights.pruning_adapter import PruningAdapter
from manyheads.shrink.weights.shrp import SHRP
from manyheads.shrink.weights.splora import SPLoRA

__all__ = [
    "AMP",
    "DHA",
    "SHRP",
    "AdaKV",
    "CARoPE",
    "CacheCall",
    "ComplexFormer",
    "Compression",
    "ContinualEncoder",
    "Cost",
    "DuoAttention",
    "Haystack",
    "KVPrediction",
    "KVPredictor",
    "LongHeads",
    "MoH",
    "Press",
    "PruningAdapter",
    "RaggedCache",
    "Recovery",
    "SPLoRA",
    "ScorePress",
    "ShrinkWay",
    "Shrunk",
    "SnapKV",
    "Streaming",
    "Window",
    "duo_gates",
    "duo_scores",
    "from_kvpress",
    "haystacks",
    "load_press",
    "measure",
    "needle_recall",
    "recover",
    "save_press",
    "shrink_way",
    "shrink_ways",
    "shrinks",
]
