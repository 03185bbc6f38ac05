"""Training with the Hugging Face Trainer, evaluation, and the folders they leave."""
