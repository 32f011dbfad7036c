package controller

import "github.com/weftmesh/weft/federation"

const (
	codeRecordMalformed            federation.Code = "WEFT2001"
	codeForeignRecord              federation.Code = "WEFT2002"
	codeOutsideGrant               federation.Code = "WEFT2003"
	codeGatewayOutsideRegistration federation.Code = "WEFT2004"
	codeReportLimit                federation.Code = "WEFT2005"
)
