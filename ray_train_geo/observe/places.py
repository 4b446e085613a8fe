"""Where regions are: by name where the name is a cloud's or a city's, else by latency (level 0)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ray_train_geo.cluster.topology import Topology

__all__ = ["Point", "arranged", "known_place"]

Point = tuple[float, float]

# Degrees north and east, rounded, of the city or state that the provider names for the region
# (AWS "Regions and Zones", Google Cloud "Regions and zones", Azure "List of Azure regions").
# Clouds that are in the same place share a row.
_PLACES = """
39 -78 virginia n-virginia northern-virginia us-east-1 us-east4 eastus eastus2 ashburn
40 -83 ohio us-east-2 us-east5 columbus
33 -80 south-carolina us-east1
38 -121 california n-california northern-california us-west-1 westus san-francisco
45 -121 oregon us-west-2 us-west1 westus2 seattle washington
34 -118 los-angeles us-west2
41 -112 salt-lake-city us-west3 utah
36 -115 las-vegas us-west4 nevada
41 -96 iowa us-central1 centralus
42 -88 chicago illinois northcentralus
33 -97 dallas texas us-south1 southcentralus
33 -112 phoenix arizona westus3
45 -74 montreal canada ca-central-1 northamerica-northeast1 canadaeast
44 -79 toronto northamerica-northeast2 canadacentral
51 -114 calgary ca-west-1
21 -100 queretaro mexico mx-central-1 mexicocentral northamerica-south1
-24 -47 sao-paulo brazil sa-east-1 southamerica-east1 brazilsouth
-33 -71 santiago chile southamerica-west1
53 -6 ireland dublin eu-west-1 northeurope
52 0 london england uk eu-west-2 europe-west2 uksouth
49 2 paris france eu-west-3 europe-west9 francecentral
50 9 frankfurt germany eu-central-1 europe-west3 germanywestcentral
52 13 berlin europe-west10
51 4 belgium europe-west1
52 5 amsterdam netherlands europe-west4 westeurope
47 9 zurich switzerland eu-central-2 europe-west6 switzerlandnorth
45 9 milan italy eu-south-1 europe-west8 italynorth
45 8 turin europe-west12
40 -4 madrid spain europe-southwest1 spaincentral
42 -1 aragon eu-south-2
59 18 stockholm sweden eu-north-1 europe-north2 swedencentral
61 27 hamina finland europe-north1
60 11 oslo norway norwayeast
52 21 warsaw poland europe-central2 polandcentral
32 35 tel-aviv israel il-central-1 me-west1 israelcentral
26 51 bahrain me-south-1
25 55 dubai uae me-central-1 uaenorth
25 51 doha qatar me-central1 qatarcentral
27 50 dammam me-central2
-34 18 cape-town south-africa af-south-1
-26 28 johannesburg africa-south1 southafricanorth
19 73 mumbai india ap-south-1 asia-south1 westindia
17 78 hyderabad ap-south-2
19 74 pune centralindia
29 77 delhi asia-south2
1 104 singapore ap-southeast-1 asia-southeast1 southeastasia
-6 107 jakarta indonesia ap-southeast-3 asia-southeast2
3 102 kuala-lumpur malaysia ap-southeast-5 malaysiawest
14 101 bangkok thailand ap-southeast-7
22 114 hong-kong ap-east-1 asia-east2 eastasia
24 121 taiwan asia-east1 ap-east-2
37 127 seoul korea ap-northeast-2 asia-northeast3 koreacentral
36 140 tokyo japan ap-northeast-1 asia-northeast1 japaneast
35 136 osaka ap-northeast-3 asia-northeast2 japanwest
40 116 beijing cn-north-1
38 106 ningxia cn-northwest-1
-34 151 sydney australia ap-southeast-2 australia-southeast1 australiaeast
-38 145 melbourne ap-southeast-4 australia-southeast2 australiasoutheast
-37 175 auckland new-zealand ap-southeast-6 newzealandnorth
"""

_BY_NAME: dict[str, Point] = {
    name: (float(east), float(north))
    for north, east, *names in map(str.split, _PLACES.strip().splitlines())
    for name in names
}


def known_place(region: str) -> Point | None:
    """``(degrees east, degrees north)`` of a region, None if its name says nothing."""
    return _BY_NAME.get("-".join(region.lower().replace("_", " ").replace(".", " ").split()))


def arranged(regions: Sequence[str], topology: Topology | None) -> tuple[list[Point], str]:
    """A place for each region, x to the right and y upwards, and how it was found.

    By name if all of them are known; else by classical scaling of the latencies; without links
    to go by, on a circle.  Of a single region there is nothing to say.
    """
    if len(regions) < 2:
        return [(0.0, 0.0)] * len(regions), ""
    places = [known_place(r) for r in regions]
    known = [p for p in places if p is not None]
    if len(known) == len(regions):
        return known, "where they are"
    latency_s = None if topology is None else _latencies(regions, topology)
    if latency_s is not None and latency_s.any():
        return _scaled(latency_s), "by latency"
    turns = [math.pi * (1 - 2 * i / len(regions)) for i in range(len(regions))]
    return [(math.cos(t), math.sin(t)) for t in turns], "on a circle"


def _latencies(regions: Sequence[str], topology: Topology) -> NDArray[np.float64] | None:
    """``[regions, regions]``; seconds one way, mean of both; None if a pair has no link."""
    first = {d.region: d for d in reversed(topology.devices)}
    if not first.keys() >= set(regions):
        return None
    found = np.zeros((len(regions), len(regions)))
    for i, a in enumerate(regions):
        for j, b in enumerate(regions):
            if i != j:
                try:
                    found[i, j] = topology.link(first[a], first[b]).latency_s
                except KeyError:
                    return None
    return (found + found.T) / 2


def _scaled(distance: NDArray[np.float64]) -> list[Point]:
    """Points in the plane about so far apart (Torgerson's classical multidimensional scaling)."""
    n = len(distance)
    centring = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-0.5 * centring @ distance**2 @ centring)
    points = np.zeros((n, 2))
    for axis, k in enumerate(np.argsort(values)[::-1][:2]):
        along = vectors[:, k] * math.sqrt(max(0.0, float(values[k])))
        # An eigenvector has no sign of its own: the first that is far out stands left (or above).
        out = along[np.abs(along) > 0.5 * np.abs(along).max(initial=0.0)]
        points[:, axis] = -along if out.size and out[0] > 0 else along
    return [(float(x), -float(y)) for x, y in points]
