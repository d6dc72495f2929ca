"""Save networks as folders of safetensors and a JSON manifest, and load them."""
