"""The child process that trains. Imports lora_core."""
