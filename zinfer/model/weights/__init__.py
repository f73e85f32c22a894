"""Where weights come from: dummy, pretrained, quantised, and the demo model."""
