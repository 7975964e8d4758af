#ifndef ADAATTN_CLIENT_CLI_REPORT_H_
#define ADAATTN_CLIENT_CLI_REPORT_H_

// How the command line shows things.

#include <string>
#include <vector>

#include "absl/types/span.h"
#include "client/replay.h"
#include "client/types.h"
#include "nlohmann/json.hpp"

namespace adaattn::client {

// Rows of cells as aligned columns; the first row is the header. Cells that look like numbers are
// aligned to the right.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows);

// "1.5 GiB", "12.3 MiB", "17 B".
std::string FormatBytes(double bytes);

std::string FormatServerInfo(const ServerInfo& info);
nlohmann::ordered_json ToJson(const ServerInfo& info);

std::string FormatSessions(absl::Span<const SessionSummary> sessions);
nlohmann::ordered_json ToJson(const SessionSummary& session);

// A line a layer: what predictions are multiplied by, and what audits say of it.
std::string FormatProfile(const ProfileSummary& profile);
nlohmann::ordered_json ToJson(const ProfileSummary& profile);

// Accuracy and bytes, then latency by stage.
std::string FormatReplays(absl::Span<const ReplayReport> reports);
// One entry of a demo's report.json.
nlohmann::ordered_json ToReportJson(const ReplayReport& report);
// The same and everything else that a replay showed.
nlohmann::ordered_json ToJson(const ReplayReport& report);
// What a command prints of them: FormatReplays, or {"runs": [...]} as JSON.
std::string PrintedReplays(absl::Span<const ReplayReport> reports, bool json);

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_CLI_REPORT_H_
