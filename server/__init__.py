"""The operator's side: releases, rollouts, the broker in a box, and the `whimbrel` command."""
