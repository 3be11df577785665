"""What `longattn.attention` builds on, beside the public names of `longattn.kernels`.

The attention package imports from `longattn.kernels` and from this module, and from no other module of this package; a test of the
workspace holds it to that. So the rest of the package may change at will, and a version range such as `longattn-kernels>=0.1,<0.2` says
something: while the minor version stays, these names stay, and so does what they take and return. They are for packages that wrap the
kernels; a model needs `longattn.kernels` alone.
"""

from longattn.kernels.axes import Layout, exchanged, in_order
from longattn.kernels.check import (
    check_attention_mask,
    check_broadcastable,
    check_dropout,
    check_key_padding,
    check_qkv,
    check_scale,
    check_sinks,
    refuse_torchscript,
    warn_of_axes,
)
from longattn.kernels.decoding import DecodeCache, decode_attention
from longattn.kernels.dispatch.call import GradientPart
from longattn.kernels.dispatch.capability import dtype_name
from longattn.kernels.dispatch.environment import (
    DEFAULT_ENVIRONMENT,
    ScratchAllocator,
    TorchAllocator,
    find_environment,
)
from longattn.kernels.dispatch.keeping import keep_measured
from longattn.kernels.dispatch.plans import find_plan
from longattn.kernels.dispatch.prepared_shards import ShardRectangle, prepare_shards, run_shards
from longattn.kernels.dispatch.table import check_backend_name
from longattn.kernels.eager.tiles import keep_tensors, kept_tensors
from longattn.kernels.entry import autocast, is_sharded, sharding_module
from longattn.kernels.hierarchy import MACHINES, Machine
from longattn.kernels.ops.arguments import Cotangents, Gradients, OpArguments, OpTensors
from longattn.kernels.ops.attend_op import attend_rectangle, rectangle_gradients, second_gradients, visible_pairs
from longattn.kernels.ops.define import define
from longattn.kernels.ops.direct import attend_prepared, prepare_and_run
from longattn.kernels.ops.direct import signature as call_signature
from longattn.kernels.options import Options, arguments_of, check_options, tensors_of, wants_gradient
from longattn.kernels.pages import PagedCache
from longattn.kernels.paging import paged_attention
from longattn.kernels.philox import as_seed
from longattn.kernels.positions import last_positions
from longattn.kernels.reference import pair_weights
from longattn.kernels.scaling import fold_scale
from longattn.kernels.state import FLOATS, add_sink, merge_detached, merge_into, minus_delta_of, state_dtype
from longattn.kernels.terms import (
    ScoreTerm,
    ScoreTerms,
    as_terms,
    at_distances,
    by_distance_of,
    check_terms,
    of_heads,
    softcap_of,
    tensors_in,
    with_tensors,
)

__all__ = [
    # what the command `longattn` tells
    "MACHINES",
    "Machine",
    # the order of axes
    "Layout",
    "exchanged",
    "in_order",
    "warn_of_axes",
    # what an argument may be
    "FLOATS",
    "Options",
    "check_attention_mask",
    "check_backend_name",
    "check_broadcastable",
    "check_dropout",
    "check_key_padding",
    "check_options",
    "check_qkv",
    "check_scale",
    "check_sinks",
    "check_terms",
    "fold_scale",
    "dtype_name",
    # DTensors
    "is_sharded",
    "sharding_module",
    # a call as an op takes it
    "Cotangents",
    "GradientPart",
    "Gradients",
    "OpArguments",
    "OpTensors",
    "arguments_of",
    "as_seed",
    "autocast",
    "define",
    "last_positions",
    "refuse_torchscript",
    "tensors_of",
    "wants_gradient",
    # attention by its definition
    "pair_weights",
    # score terms
    "ScoreTerm",
    "ScoreTerms",
    "as_terms",
    "at_distances",
    "by_distance_of",
    "of_heads",
    "softcap_of",
    "tensors_in",
    "with_tensors",
    # one rectangle, on real tensors
    "attend_rectangle",
    "rectangle_gradients",
    "second_gradients",
    "visible_pairs",
    # calls that were looked up before
    "call_signature",
    "attend_prepared",
    "prepare_and_run",
    "ShardRectangle",
    "prepare_shards",
    "run_shards",
    # plans and memory
    "ScratchAllocator",
    "DEFAULT_ENVIRONMENT",
    "TorchAllocator",
    "find_environment",
    "find_plan",
    "keep_tensors",
    "kept_tensors",
    # what is measured once
    "keep_measured",
    # states
    "add_sink",
    "merge_detached",
    "merge_into",
    "minus_delta_of",
    "state_dtype",
    # a decoder step
    "DecodeCache",
    "decode_attention",
    "PagedCache",
    "paged_attention",
]
