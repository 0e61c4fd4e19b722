"""Clients: subscribers that show, keep or hand on what a publisher sends."""
