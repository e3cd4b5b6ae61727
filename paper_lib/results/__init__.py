"""For readers: figures with the numbers behind them, criteria and verdicts."""
