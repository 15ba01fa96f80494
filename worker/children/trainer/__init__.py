"""The child process that trains. It imports lora_core."""
