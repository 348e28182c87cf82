"""The paper, in reading order: ATF, output experts, ID statistics, fusion, settings, metrics."""
