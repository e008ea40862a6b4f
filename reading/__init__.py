"""What a run left behind: its options and metrics (`runs`), its trained model (`trained`)."""
