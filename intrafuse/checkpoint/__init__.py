"""Networks as folders: safetensors beside a JSON manifest."""
