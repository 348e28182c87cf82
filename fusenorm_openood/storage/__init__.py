"""Files written whole, URLs, configurations, the detector file, stored scores."""
