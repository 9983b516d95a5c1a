"""The key broker: rules (`key_broker`), network (`service`), and those who call it (`client`)."""
