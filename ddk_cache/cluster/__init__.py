"""A build by the workers of a Ray cluster: orders, workers, and the driver that watches them."""
