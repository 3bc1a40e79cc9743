"""Makes sets of shards to train from: of videos, of prompts and a teacher, of the built-in world, of other sets."""
