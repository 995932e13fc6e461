"""The menu: prompts over the same commands, for someone who read nothing."""
