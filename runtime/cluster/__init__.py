"""Ray's side: places, starts and watches shard processes. Not trusted; never imports torch."""
