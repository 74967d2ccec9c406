from numerics import nan_outputs

__all__ = ["nan_outputs"]
