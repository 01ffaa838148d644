"""The student: what answers for a task, a head on a sentence encoder, a LoRA adapter, or both."""
