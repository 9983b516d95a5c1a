"""Programs that put one engine each under load, told what to do by `benchmarks.driver`."""
