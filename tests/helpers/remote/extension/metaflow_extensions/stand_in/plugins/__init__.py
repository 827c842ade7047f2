"""For tests only: takes the place of the local metadata provider."""

METADATA_PROVIDERS_DESC = [("local", ".metadata_in_pod.MetadataInPod")]
