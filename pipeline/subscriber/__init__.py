"""The subscriber: connections to publishers, lost messages, and the frames it yields."""
