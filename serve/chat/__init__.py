"""`llmlite chat`: a conversation in the terminal with a server, its own or another."""
