from collections.abc import Callable
from typing import Any

compiler: str
isas_built: list[str]
cpu_features: list[str]
isa: str

def packed_bytes(
    op: int,
    in_channels: int,
    mid_channels: int,
    out_channels: int,
    kernel_h: int,
    kernel_w: int,
    itemsize: int,
    squeezed_channels: int = 0,
    no_expansion: bool = False,
) -> int: ...

class Watch:
    def __init__(
        self,
        *,
        members: list[dict[str, Any]],
        versioned: list[Any],
        unversioned: list[Any],
        aliases: list[Any],
        hooks: list[dict[int, Any]],
        instances: list[dict[str, Any]],
        calls: bool,
        version: Any,
        data_ptr: Callable[[Any], int],
    ) -> None: ...
    def unchanged(self) -> bool: ...
