"""What a fine-tune has learned: read off its pictures of the drawn world, and told in a report."""
