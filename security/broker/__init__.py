"""The key broker: rules (`key_broker` and its parts), network (`service`), callers (`client`)."""
