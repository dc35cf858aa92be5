"""The sweep itself: which fold trial runs next, on Ray Tune and with Optuna's suggestions."""
