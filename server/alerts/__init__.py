"""What a server tells other programs of by itself: alerts, and how they get to the webhooks that want them."""
