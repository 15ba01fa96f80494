"""Counter-based random numbers, safetensors files, interrupts and device errors."""
