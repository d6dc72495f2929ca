"""Score the channels of a group."""
