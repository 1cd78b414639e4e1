"""Runtimes that cross a process border: `torch_distributed` for a trusted cluster, `nvflare` across organisations."""
