"""The loss of a student compared with its teacher."""
