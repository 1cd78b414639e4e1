"""Where a federation's rounds are written to while it runs: the callback protocol and adapters for trackers.

Each tracker is imported by its own module (`from llmchain_fed.tracking.mlflow import MLflow`) and brought by the extra
of that name; the console's table by `rich`.
"""
