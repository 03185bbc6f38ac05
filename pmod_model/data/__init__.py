"""Conversation records, images, and what turns them into token ids and labels."""
