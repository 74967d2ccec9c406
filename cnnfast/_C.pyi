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
