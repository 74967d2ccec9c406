"""Problems for the host-run inverted_residual, and how its op is called."""

import torch
from numerics import fresh_generator
from op_cases import Case, arguments_of, make

from cnnfast.ops.arguments import edges

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def case(c, e, out, size, k=3, s=1, p="same", **more):
    """e: expanded channels, None: no expansion."""
    k = (k, k) if isinstance(k, int) else k
    return dict(c=c, e=e, out=out, size=size, k=k, stride=s, padding=p) | more


def draw_case(row, dtype, **more):
    row = dict(row) | more
    e = row.pop("e")
    row |= dict(expand=e is not None, multiplier=-(-(e or 0) // row["c"]))
    drawn = make("inverted_residual", fresh_generator(), dtype=dtype, decades=row.pop("decades", 3.0), **row)
    if e is not None:  # op_cases has more: never a multiple of anything
        t = drawn.tensors
        for name in t:
            if name.startswith(("expand", "dw", "se_expand")):
                t[name] = t[name][:e].contiguous()
        for name in ("se_reduce_weight", "project_weight"):
            if name in t:
                t[name] = t[name][:, :e].contiguous()
    return drawn


def positional(host, drawn: Case, tf32=False, **changes):
    """The op's arguments, of which a case has all but tf32."""
    schema = host.ops.inverted_residual.default
    arguments = list(arguments_of(schema, drawn.tensors | changes | {"tf32": tf32}, drawn.options))
    if drawn.options["padding"] != "same":
        names = [argument.name for argument in schema._schema.arguments]
        arguments[names.index("padding")] = list(edges(drawn.options["padding"]))
    return arguments


def run(host, drawn: Case, tf32=False, **changes):
    return host.ops.inverted_residual(*positional(host, drawn, tf32, **changes))


# Blocks of MobileNetV2 and EfficientNet, smaller: several tiles, chunks and ends of both.
NETWORKS = [
    case(32, None, 16, (12, 9), activation="relu6"),
    case(16, 96, 24, (14, 13), s=2, activation="relu6"),
    case(24, 144, 24, (9, 19), activation="relu6"),
    case(64, 80, 96, (7, 7), activation="relu6", residual=False),
    case(96, 72, 160, (14, 14), s=2, activation="relu6"),
    case(160, 40, 320, (7, 7), n=1),
    case(24, 72, 40, (14, 14), k=5, s=2, activation="silu"),
    case(40, 72, 40, (9, 9), k=5, activation="silu"),
    case(112, 40, 192, (14, 14), k=5, s=2, activation="silu", n=1),
]
# Anything else: sizes that no tile or vector divides, what only the kernel without constants takes, other activations.
ODD = [
    case(16, 32, 16, (1, 1)),
    case(16, 48, 24, (6, 1), bias=False),
    case(8, 16, 8, (1, 23), k=5),
    case(1, 1, 1, (5, 4), activation=None),
    case(3, 7, 5, (7, 5), activation="sigmoid"),
    case(17, 29, 67, (11, 13), activation="gelu", residual=False),
    case(5, None, 13, (6, 7), k=5, activation="tanh"),
    case(131, 33, 16, (5, 5), n=1),
    case(16, 40, 200, (9, 9), p=(2, 0, 1, 3)),  # two blocks of output channels
    case(16, 40, 16, (8, 10), s=2, p=(0, 1, 0, 1)),
    case(16, 40, 16, (2, 3), s=2, p=(3, 2, 2, 1)),  # tiles of padding alone
    case(8, 24, 8, (3, 3), s=4, p=1),
    case(8, 24, 16, (9, 8), k=1, activation="relu"),
    case(8, None, 72, (10, 11), k=(2, 3), s=(3, 1), dilation=(2, 1), p=(1, 0, 2, 3)),
    case(24, 40, 24, (9, 9), k=7, dilation=2),
    case(24, 40, 24, (7, 6), layout="nchw"),
    case(24, 40, 1, (7, 6), layout="nchw"),
]
EXCITED = [  # with squeeze-excite
    case(16, 96, 24, (14, 13), s=2, activation="silu"),
    case(24, 144, 24, (9, 19), activation="silu"),
    case(40, 240, 80, (7, 7), k=5, activation="silu", residual=False),
    case(112, 72, 192, (14, 14), k=5, s=2, activation="silu", n=1),
    case(32, None, 16, (12, 9), activation="silu"),
    case(16, 32, 16, (1, 1)),
    case(5, 13, 7, (6, 1), bias=False),
    case(3, 71, 67, (9, 11), k=(2, 3), s=(3, 1), dilation=(2, 1), p=(1, 0, 2, 3)),
    case(24, 40, 24, (7, 6), layout="nchw"),
    case(8, 384, 16, (3, 3), n=1),  # few tiles: blocks of chunks
]
EXCITED = [row | dict(excite=True) for row in EXCITED]
EMPTY = [
    case(8, 16, 8, (5, 5), n=0),
    case(8, 16, 8, (5, 5), n=0, layout="nchw"),
    case(8, 16, 8, (5, 5), n=0, excite=True),
]
# Bytes of x's channels, and output channels: weights of one stage, and smaller and smaller tiles.
TIGHT = [(400, 192), (640, 192), (800, 160), (1200, 16), (1300, 16)]
