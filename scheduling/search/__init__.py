"""The search: samplers, Optuna's study, and what is shown of it."""
