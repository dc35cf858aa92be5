"""Names of a fold trial's kinds of weights that every candidate may have."""

RAW = "raw"
"""The weights as they were trained."""
EMA = "ema"
"""Their exponential moving average."""
