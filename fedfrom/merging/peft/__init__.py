"""PEFT's formats: the keys of an adapter's state dict, and adapter_config.json."""
