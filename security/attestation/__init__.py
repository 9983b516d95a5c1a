"""Evidence: made on the shard's machine (`collect`), verified by the broker (`appraise`)."""
