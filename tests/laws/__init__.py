"""Laws that every registered block and quantizer must obey, generated from the registry."""
