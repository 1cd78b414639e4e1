"""LoRA adapters on one base: which configurations work, switching, residents, the frozen remainder, another rank."""
