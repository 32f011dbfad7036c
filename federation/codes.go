package federation

// Codes of findings. The thousands say where one comes from: 1 the catalog, 2
// what a cluster's source says, 3 the control link and the proxies' config, 4
// the data path, 5 identity, 6 controllers and the store. Whoever raises a new
// kind of finding adds its code here and its entry below, at the end of its
// group; a code is never used again for something else.
const (
	CodeMemberContested   Code = "WEFT1001"
	CodeMemberPending     Code = "WEFT1002"
	CodeMemberQuarantined Code = "WEFT1003"
	CodeNoGrants          Code = "WEFT1004"
	CodeSharedGateway     Code = "WEFT1005"

	CodeExportContested            Code = "WEFT1101"
	CodeExportOfUnknownMember      Code = "WEFT1102"
	CodeExportOfInactiveMember     Code = "WEFT1103"
	CodeOutsideGrant               Code = "WEFT1104"
	CodeGatewayOutsideRegistration Code = "WEFT1105"
	CodeNoGateway                  Code = "WEFT1106"
	CodePortConflict               Code = "WEFT1107"
	CodeProtocolNotCarried         Code = "WEFT1108"
	CodeBadPorts                   Code = "WEFT1109"
	CodePassthroughServesNobody    Code = "WEFT1110"
	CodeVisibleToNobody            Code = "WEFT1111"
	CodeTooManyExports             Code = "WEFT1112"
	CodeClaimsOtherCluster         Code = "WEFT1113"
	CodeRecordRefused              Code = "WEFT1114"

	CodePolicyContested      Code = "WEFT1201"
	CodePolicyInvalid        Code = "WEFT1202"
	CodePolicyShadowed       Code = "WEFT1203"
	CodePolicyUnknownCluster Code = "WEFT1204"
	CodePolicyUnknownRegion  Code = "WEFT1205"
	CodePolicyStepUnreached  Code = "WEFT1206"
	CodePolicySplitStray     Code = "WEFT1207"
	CodePolicyNoTarget       Code = "WEFT1208"
	CodePolicyUnknownOrigin  Code = "WEFT1209"

	CodeSourceUnreadable   Code = "WEFT2001"
	CodeSourceEmptied      Code = "WEFT2002"
	CodeFileMalformed      Code = "WEFT2003"
	CodeUnknownField       Code = "WEFT2004"
	CodeFieldInvalid       Code = "WEFT2005"
	CodeDuplicateService   Code = "WEFT2006"
	CodeFileTooLarge       Code = "WEFT2007"
	CodePortOutOfRange     Code = "WEFT2008"
	CodeHealthCheckFailing Code = "WEFT2009"
	CodeSourceWithout      Code = "WEFT2010"

	CodeControlLinkDown    Code = "WEFT3001"
	CodeMemberSuspect      Code = "WEFT3002"
	CodeMemberExpired      Code = "WEFT3003"
	CodeProxyRefusedConfig Code = "WEFT3004"
	CodeProxyBehind        Code = "WEFT3005"
	CodeNoProxyConnected   Code = "WEFT3006"
	CodeLastGoodUnusable   Code = "WEFT3007"
	CodeManyMembersSilent  Code = "WEFT3008"
	CodeSessionTakenOver   Code = "WEFT3009"
	CodeLastGoodNotSaved   Code = "WEFT3010"
	CodeResourcesNotBuilt  Code = "WEFT3011"

	CodeGatewaySilent      Code = "WEFT4001"
	CodeGatewayUnresolved  Code = "WEFT4002"
	CodePeerRefused        Code = "WEFT4003"
	CodePeerWrongIdentity  Code = "WEFT4004"
	CodeNoAddressesLeft    Code = "WEFT4005"
	CodeForeignCaller      Code = "WEFT4006"
	CodePortBusy           Code = "WEFT4007"
	CodeServiceUnreachable Code = "WEFT4008"

	CodeRenewalFailing  Code = "WEFT5001"
	CodeSVIDExpired     Code = "WEFT5002"
	CodeClockSkew       Code = "WEFT5003"
	CodeBundleBehind    Code = "WEFT5004"
	CodeAuthorityAging  Code = "WEFT5005"
	CodeIdentityDenied  Code = "WEFT5006"
	CodeTokenRefused    Code = "WEFT5007"
	CodeIdentityOutside Code = "WEFT5008"

	CodeStoreUnreachable Code = "WEFT6001"
	CodeStoreQuota       Code = "WEFT6002"
	CodeStoreCorrupt     Code = "WEFT6003"
	CodeRecovering       Code = "WEFT6004"
	CodeNoLeader         Code = "WEFT6005"
	CodeRecordUnreadable Code = "WEFT6006"
)

func codes() []Documentation { return documented[:] }

// documented is sorted by code.
var documented = [...]Documentation{
	{
		CodeMemberContested, Error, "two registrations of one cluster",
		"The catalog was given registrations that share a name and differ. The one of the highest generation is used.",
		"register the cluster under one name once: weft cluster deregister, then register again", nil,
	},
	{
		CodeMemberPending, Info, "cluster has not enrolled",
		"The cluster is registered, but no agent has redeemed its token. What it exports is kept, and not used.",
		"run weft-agent with the token in that cluster; weft cluster token makes a new one", nil,
	},
	{
		CodeMemberQuarantined, Warning, "cluster is quarantined",
		"An operator has quarantined the cluster. Its identities are refused; its exports are kept, and not used.",
		"enrol the cluster anew once the reason is gone", nil,
	},
	{
		CodeNoGrants, Warning, "cluster may export nothing",
		"The registration of the cluster has no grant. Without a grant there is no export.",
		"weft cluster grant CLUSTER NAMESPACE/NAME", nil,
	},
	{
		CodeSharedGateway, Warning, "gateway registered by two clusters",
		"Two clusters have registered the same gateway address. Traffic for one of them will reach the other's gateway and be refused there.",
		"give every cluster gateway addresses of its own", nil,
	},

	{
		CodeExportContested, Error, "two exports of one name",
		"The catalog was given exports of one cluster and service that differ. The one accepted first is used.",
		"report each service once", nil,
	},
	{
		CodeExportOfUnknownMember, Warning, "export of a cluster that is not registered",
		"There is an export of a cluster that nobody has registered. It is kept, and not used.",
		"register the cluster, or remove what it left behind", nil,
	},
	{
		CodeExportOfInactiveMember, Warning, "export of a cluster that is not active",
		"The cluster is pending, quarantined or deregistered. The export is kept, and not used.",
		"enrol the cluster",
		[]Code{CodeMemberPending, CodeMemberQuarantined},
	},
	{
		CodeOutsideGrant, Error, "service outside the cluster's grants",
		"No grant in the cluster's registration covers the service. The export is not used.",
		"weft cluster grant CLUSTER NAMESPACE/NAME, or stop exporting the service",
		[]Code{CodeNoGrants},
	},
	{
		CodeGatewayOutsideRegistration, Error, "gateway outside the cluster's registration",
		"The export names a gateway address that the cluster's registration does not list, so traffic could be led astray. The export is not used.",
		"name registered gateways only, or register the address", nil,
	},
	{
		CodeNoGateway, Warning, "export names no gateway",
		"Without a gateway no other cluster can reach the service.",
		"give the cluster a gateway: weft cluster register --gateway HOST:PORT, and start weft-gateway there", nil,
	},
	{
		CodePortConflict, Warning, "clusters disagree about a port",
		"Clusters export the service with ports that contradict each other. The export accepted first decides; traffic for a port goes only to clusters that expose it.",
		"give the port the same name, number, protocol and appProtocol in every cluster", nil,
	},
	{
		CodeProtocolNotCarried, Info, "port is not carried between clusters",
		"Only TCP is carried between clusters so far. The port is listed, and cannot be reached from other clusters.",
		"nothing, if it is used inside its cluster only", nil,
	},
	{
		CodeBadPorts, Error, "ports of an export contradict each other",
		"One export has two ports of one name, or of one number and protocol. The first counts.",
		"give each port a name and number of its own", nil,
	},
	{
		CodePassthroughServesNobody, Error, "passthrough without identities",
		"The export passes tunnels through to the service's own proxies, but names no identity that these may have. No caller could verify whom it reaches, so other clusters do not use it.",
		"set spec.serviceAccounts of the service", nil,
	},
	{
		CodeVisibleToNobody, Warning, "export is visible to nobody",
		"The visibility of the export selects no other cluster that is registered.",
		"name registered clusters or regions, or leave visibility out to show it to all", nil,
	},
	{
		CodeTooManyExports, Error, "too many exports of one cluster",
		"The cluster exports more services than its registration, or the mesh, allows. What was exported before stays; the rest is refused.",
		"raise the cluster's limit, or export fewer services", nil,
	},
	{
		CodeClaimsOtherCluster, Error, "agent claims another cluster",
		"An agent has reported a record under another cluster's name. A member speaks for itself only: the record was refused.",
		"check the agent's configuration; if it is right, treat the agent as stolen: weft cluster deregister", nil,
	},
	{
		CodeRecordRefused, Error, "record refused",
		"A report held a record that is malformed. It was refused; the others were taken, and its last good version stays.",
		"mend what the message names", nil,
	},

	{
		CodePolicyContested, Error, "two policies of one name",
		"The catalog was given policies of one origin and name that differ. The one accepted first is used.",
		"apply each policy once", nil,
	},
	{
		CodePolicyInvalid, Error, "policy cannot be carried out",
		"The policy contradicts itself. It is passed over: the next most specific policy is in force, or the default.",
		"mend what the message names and apply it again", nil,
	},
	{
		CodePolicyShadowed, Warning, "another policy has the same target",
		"Two policies of one origin have the same target. The one accepted first is in force.",
		"delete one of the two", nil,
	},
	{
		CodePolicyUnknownCluster, Warning, "policy names a cluster that is not registered",
		"A name that no cluster has selects nothing. It counts as soon as a cluster of that name is registered.",
		"check the spelling: weft get clusters", nil,
	},
	{
		CodePolicyUnknownRegion, Warning, "policy names a region without clusters",
		"A region that no cluster is in selects nothing. It counts as soon as a cluster is.",
		"check the spelling: weft get clusters -o wide", nil,
	},
	{
		CodePolicyStepUnreached, Info, "step of the order names nobody",
		"Every cluster that the step could name belongs to an earlier step.",
		"leave the step out, or put it first", nil,
	},
	{
		CodePolicySplitStray, Warning, "split names a cluster outside its step",
		"A weight counts only for a cluster that belongs to the step of the split, and to no earlier one.",
		"name the cluster in the step, or leave its weight out", nil,
	},
	{
		CodePolicyNoTarget, Info, "policy is for a service that nobody exports",
		"The policy is in force as soon as a cluster exports the service.",
		"check the spelling: weft get services", nil,
	},
	{
		CodePolicyUnknownOrigin, Warning, "policy of a cluster that is not registered",
		"The policy was written by a cluster that is not registered, and governs nobody.",
		"register the cluster, or remove what it left behind", nil,
	},

	{
		CodeSourceUnreadable, Error, "source cannot be read",
		"The agent cannot read its folder of services, or its cluster's API. What it reported before stays; nothing is withdrawn.",
		"mend the permission or path that the message names", nil,
	},
	{
		CodeSourceEmptied, Error, "source is suddenly empty",
		"The agent's source held services and now holds none. That looks like a lost mount rather than a wish, so nothing is withdrawn.",
		"restore the files; to withdraw everything on purpose, put an empty file named .weft-empty into the folder", nil,
	},
	{
		CodeFileMalformed, Error, "document cannot be read",
		"A document is not YAML, or none that Weft knows. It is set aside; its last good version stays, and all other documents count.",
		"mend what the message names", nil,
	},
	{
		CodeUnknownField, Error, "unknown field",
		"A document has a field that does not exist, most often by a slip of the pen. It is set aside; its last good version stays.",
		"correct or remove the field", nil,
	},
	{
		CodeFieldInvalid, Error, "field with a value that is not allowed",
		"A document is set aside because of a value; its last good version stays.",
		"set the field to what the message allows", nil,
	},
	{
		CodeDuplicateService, Error, "defined twice",
		"Two documents define the same service or policy. The first, by file name and place, counts.",
		"keep one of the two", nil,
	},
	{
		CodeFileTooLarge, Error, "file too large",
		"A file is larger than 1 MiB, or holds too many or too deeply nested documents. It is set aside.",
		"split the file", nil,
	},
	{
		CodePortOutOfRange, Error, "port out of range",
		"A port is not between 1 and 65535. The document is set aside; its last good version stays.",
		"set the port to a number from 1 to 65535", nil,
	},
	{
		CodeHealthCheckFailing, Warning, "endpoint fails its health check",
		"The agent's health check of an endpoint fails. The endpoint takes no traffic until it succeeds.",
		"look at the endpoint, then at the check", nil,
	},
	{
		CodeSourceWithout, Info, "source holds no service",
		"The agent's source holds no service, and has held none. The cluster's callers use the services of others; it offers none itself.",
		"put a Service into the folder; if it is meant to be empty, put an empty file named .weft-empty beside", nil,
	},

	{
		CodeControlLinkDown, Warning, "no link to a controller",
		"The agent reaches no controller. Traffic goes on by the last good state; changes do not arrive.",
		"check that a controller runs and that the agent can reach its address", nil,
	},
	{
		CodeMemberSuspect, Warning, "control link is silent",
		"Nothing has been heard of the cluster's agent for a while. By default its share stays.",
		"look at weft-agent in that cluster and at its way to the controller", nil,
	},
	{
		CodeMemberExpired, Error, "control link has been silent for long",
		"Nothing has been heard of the cluster's agent for so long that policies put it behind others, unless its gateways still answer.",
		"look at weft-agent in that cluster and at its way to the controller", nil,
	},
	{
		CodeProxyRefusedConfig, Error, "proxy refused its configuration",
		"A gateway or proxy has refused (NACK) a resource. It goes on with the last one that it accepted.",
		"look at the refusal's text; update the proxy if it is older than its agent", nil,
	},
	{
		CodeProxyBehind, Warning, "proxy is behind",
		"A connected gateway or proxy has not acknowledged the current revision for a while.",
		"look at the proxy's load and log",
		[]Code{CodeProxyRefusedConfig},
	},
	{
		CodeNoProxyConnected, Warning, "no gateway is connected",
		"No gateway is connected to the cluster's agent, so nothing crosses this cluster's border.",
		"start weft-gateway in that cluster", nil,
	},
	{
		CodeLastGoodUnusable, Error, "last good state cannot be used",
		"The agent's saved state is damaged or of another trust domain. It was set aside; the agent starts without one and serves once it has synced.",
		"nothing, if a controller can be reached", nil,
	},
	{
		CodeManyMembersSilent, Error, "many clusters fell silent at once",
		"So many clusters fell silent together that the fault is likelier at the controller or its network. None of them expires.",
		"look at the controller's network", nil,
	},
	{
		CodeSessionTakenOver, Info, "session taken over",
		"A newer session of the same cluster took over; the older one may change nothing.",
		"nothing; if it repeats, two agents of one cluster compete", nil,
	},
	{
		CodeLastGoodNotSaved, Error, "last good state cannot be saved",
		"The agent cannot write its state to disk. It goes on, but a restart without a controller would start from older state.",
		"free space, or mend the permission that the message names", nil,
	},
	{
		CodeResourcesNotBuilt, Error, "configuration cannot be built",
		"The agent cannot turn a service, or the list of all services, into resources for its proxies. What they were told last stays in force.",
		"mend what the message names", nil,
	},

	{
		CodeGatewaySilent, Error, "gateway does not answer",
		"The gateways of one cluster get no answer from another's. Its exports stand behind all that answer.",
		"check the network between the two, port 15443, and the gateway itself", nil,
	},
	{
		CodeGatewayUnresolved, Warning, "gateway's name does not resolve",
		"A gateway is registered by a DNS name that does not resolve here. The last good answer stays in use.",
		"mend the name's record, or the resolver", nil,
	},
	{
		CodePeerRefused, Error, "peer refused",
		"A gateway has refused peers that could not prove an allowed identity.",
		"check who connects; after a rotation, look at weft trust",
		[]Code{CodeBundleBehind, CodeClockSkew},
	},
	{
		CodePeerWrongIdentity, Error, "gateway shows the wrong identity",
		"What answers at a gateway's address is not the gateway of that cluster. The connection was closed before any byte.",
		"check the gateway addresses of the registration",
		[]Code{CodeBundleBehind, CodeSharedGateway},
	},
	{
		CodeNoAddressesLeft, Error, "no clusterset address left",
		"The cluster's range of clusterset addresses is used up. New services get none there.",
		"register the cluster with a larger range", nil,
	},
	{
		CodeForeignCaller, Error, "gateway asserts a foreign caller",
		"A gateway has claimed a caller that is not of its own cluster. The stream was refused.",
		"treat that gateway as stolen: quarantine its cluster", nil,
	},
	{
		CodePortBusy, Error, "address is in use",
		"A process cannot listen on an address that another has.",
		"end the other process, or choose another address", nil,
	},
	{
		CodeServiceUnreachable, Error, "service cannot be reached from anywhere",
		"No cluster has a ready endpoint of the service that may be used.",
		"weft why SERVICE --from CLUSTER says why for each cluster", nil,
	},

	{
		CodeRenewalFailing, Warning, "SVID renewal fails",
		"An identity is past the middle of its life and could not be renewed. It goes on until it expires, and renewal is tried again.",
		"look at the message; the controller or the region's issuer must be reachable",
		[]Code{CodeControlLinkDown},
	},
	{
		CodeSVIDExpired, Error, "SVID has expired",
		"An identity has expired. Peers refuse its holder until it is renewed.",
		"restore the way to the controller; an agent renews for 30 days by its enrolled key",
		[]Code{CodeRenewalFailing, CodeClockSkew},
	},
	{
		CodeClockSkew, Warning, "clock differs",
		"The clock of a cluster and the controller's differ so much that certificates may look expired or not yet valid.",
		"run a time service (NTP) there", nil,
	},
	{
		CodeBundleBehind, Warning, "trust bundle is behind",
		"Some proxies have not acknowledged the newest trust bundle. A rotation waits for them.",
		"look at those proxies: weft get gateways",
		[]Code{CodeProxyRefusedConfig, CodeControlLinkDown},
	},
	{
		CodeAuthorityAging, Warning, "authority nears its end",
		"A signing authority is close to the end of its life, and no successor is active.",
		"weft trust shows what the rotation waits for",
		[]Code{CodeBundleBehind},
	},
	{
		CodeIdentityDenied, Error, "denied identity in use",
		"A process has presented an identity of a cluster or generation that is denied. It was refused.",
		"stop that process; enrol its cluster anew if it is wanted", nil,
	},
	{
		CodeTokenRefused, Warning, "join token refused",
		"Somebody has presented a join token that is unknown, used or expired.",
		"make a new one: weft cluster token", nil,
	},
	{
		CodeIdentityOutside, Error, "identity outside the cluster asked for",
		"An agent has asked for an identity that does not lie under its own cluster. It was refused.",
		"check the agent's configuration; if it is right, treat the agent as stolen", nil,
	},

	{
		CodeStoreUnreachable, Error, "store cannot be reached",
		"A controller cannot reach etcd. Reads go on from memory; changes wait.",
		"check etcd's endpoints and health", nil,
	},
	{
		CodeStoreQuota, Error, "store nears its quota",
		"etcd is close to the size at which it refuses writes.",
		"compact and defragment, or raise the quota", nil,
	},
	{
		CodeStoreCorrupt, Error, "store is corrupt",
		"etcd reports that its members or its data disagree.",
		"replace the member concerned, or restore a backup", nil,
	},
	{
		CodeRecovering, Warning, "recovering from a backup",
		"The store was restored. Until every member has reported, or an operator ends it, things are added and nothing is removed.",
		"start the agents that are missing, or end the recovery", nil,
	},
	{
		CodeNoLeader, Warning, "no leader among the controllers",
		"No controller leads, so drains do not move and nobody's liveness changes.",
		"start a controller, or look at why none wins the election",
		[]Code{CodeStoreUnreachable},
	},
	{
		CodeRecordUnreadable, Error, "stored record cannot be read",
		"A record in the store is damaged or of a newer version. It is skipped; its last good version stays in use.",
		"update the controllers, or write the record anew", nil,
	},
}
