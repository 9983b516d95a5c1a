"""The shard process: control protocol, life, epochs and links, and how one is started."""
