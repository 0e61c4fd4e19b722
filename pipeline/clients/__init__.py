"""Clients: subscribers that show, record or forward what a publisher sends."""
