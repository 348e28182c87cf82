"""Training runs on a benchmark: tables, comparisons, leaderboard entries."""
