"""What `hfbd train` and the benchmarks run: arms, refit, gates, verdict, presets."""
