"""A chain as a folder of YAML and safetensors, and back."""
