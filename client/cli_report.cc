#include "client/cli_report.h"

#include <algorithm>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"

namespace adaattn::client {
namespace {

bool LooksLikeNumber(const std::string& cell) {
  double value = 0;
  return absl::SimpleAtod(absl::StripSuffix(cell, "%"), &value) || cell == "-";
}

std::vector<std::string> Names(const ServerInfo& info) {
  std::vector<std::string> names;
  for (PageFormat format : info.page_formats) names.emplace_back(PageFormatName(format));
  return names;
}

std::vector<std::string> ModeNames(const ServerInfo& info) {
  std::vector<std::string> names;
  for (Mode mode : info.modes) names.emplace_back(ModeName(mode));
  return names;
}

std::vector<std::string> PolicyNames(const ServerInfo& info) {
  std::vector<std::string> names;
  for (Policy policy : info.policies) names.emplace_back(PolicyName(policy));
  return names;
}

nlohmann::ordered_json ToJson(const Quantiles& quantiles) {
  return {{"p50", quantiles.p50}, {"p99", quantiles.p99}};
}

std::string ShapeOf(const ModelShape& model) {
  return absl::StrCat(model.num_layers, "x", model.num_q_heads, "/", model.num_kv_heads, "x",
                      model.head_dim);
}

}  // namespace

std::string FormatTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string table;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - row[i].size(), ' ');
      // A header follows its column.
      const bool right = LooksLikeNumber(&row == &rows[0] && rows.size() > 1 ? rows[1][i] : row[i]);
      absl::StrAppend(&line, i == 0 ? "" : "  ", right ? padding : "", row[i],
                      right ? "" : padding);
    }
    absl::StrAppend(&table, absl::StripTrailingAsciiWhitespace(line), "\n");
  }
  return table;
}

std::string FormatBytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? absl::StrFormat("%.0f B", bytes)
                   : absl::StrFormat("%.1f %s", bytes, kUnits[unit]);
}

std::string FormatServerInfo(const ServerInfo& info) {
  return FormatTable({
      {"version", absl::StrCat(info.version, " (", info.build, ")")},
      {"instance", info.instance},
      {"backend", absl::StrCat(info.backend, " on ", info.device, ", ", info.kernels)},
      {"tuning", info.tuning},
      {"head dims", absl::StrJoin(info.head_dims, " ")},
      {"page formats", absl::StrJoin(Names(info), " ")},
      {"default format", PageFormatName(info.default_page_format)},
      {"modes", absl::StrJoin(ModeNames(info), " ")},
      {"policies", absl::StrJoin(PolicyNames(info), " ")},
      {"largest group", absl::StrCat(info.max_group_size, " q heads a kv head")},
      {"longest q", absl::StrCat(info.max_q_len, " rows a sequence")},
      {"pool", absl::StrCat(FormatBytes(static_cast<double>(info.pool_bytes_free)), " free of ",
                            FormatBytes(static_cast<double>(info.pool_bytes)))},
      {"longest message", FormatBytes(static_cast<double>(info.max_message_bytes))},
      {"sessions", absl::StrCat("at most ", info.max_sessions, ", of ", info.max_tokens_per_session,
                                " tokens a layer")},
      {"lease", absl::FormatDuration(info.default_lease)},
      {"refused here", absl::StrJoin(info.unsupported, ", ")},
  });
}

nlohmann::ordered_json ToJson(const ServerInfo& info) {
  return {{"version", info.version},
          {"build", info.build},
          {"instance", info.instance},
          {"backend", info.backend},
          {"device", info.device},
          {"kernels", info.kernels},
          {"tuning", info.tuning},
          {"head_dims", info.head_dims},
          {"page_formats", Names(info)},
          {"default_page_format", PageFormatName(info.default_page_format)},
          {"modes", ModeNames(info)},
          {"policies", PolicyNames(info)},
          {"max_group_size", info.max_group_size},
          {"max_q_len", info.max_q_len},
          {"pool_bytes", info.pool_bytes},
          {"pool_bytes_free", info.pool_bytes_free},
          {"exact_tier_bytes", info.exact_tier_bytes},
          {"exact_tier_bytes_free", info.exact_tier_bytes_free},
          {"max_message_bytes", info.max_message_bytes},
          {"max_tokens_per_session", info.max_tokens_per_session},
          {"max_sessions", info.max_sessions},
          {"default_lease_seconds", absl::ToDoubleSeconds(info.default_lease)},
          {"unsupported", info.unsupported}};
}

std::string FormatSessions(absl::Span<const SessionSummary> sessions) {
  std::vector<std::vector<std::string>> rows = {
      {"session", "shape", "pages", "kv_len", "dense", "sealed", "memory", "age", "lease left"}};
  for (const SessionSummary& session : sessions) {
    rows.push_back({session.session.session_id, ShapeOf(session.model),
                    PageFormatName(session.page_format), absl::StrCat(session.kv_len),
                    absl::StrCat(session.pages_dense), absl::StrCat(session.pages_sealed),
                    FormatBytes(static_cast<double>(session.bytes)),
                    absl::FormatDuration(absl::Trunc(session.age, absl::Seconds(1))),
                    absl::FormatDuration(absl::Trunc(session.lease_left, absl::Seconds(1)))});
  }
  return FormatTable(rows);
}

nlohmann::ordered_json ToJson(const SessionSummary& session) {
  return {{"session_id", session.session.session_id},
          {"epoch", session.session.epoch},
          {"num_layers", session.model.num_layers},
          {"num_q_heads", session.model.num_q_heads},
          {"num_kv_heads", session.model.num_kv_heads},
          {"head_dim", session.model.head_dim},
          {"page_format", PageFormatName(session.page_format)},
          {"element_type", DTypeName(session.element_type)},
          {"kv_len", session.kv_len},
          {"pages_dense", session.pages_dense},
          {"pages_sealed", session.pages_sealed},
          {"pages_exact", session.pages_exact},
          {"bytes", session.bytes},
          {"exact_tier_bytes", session.exact_tier_bytes},
          {"age_seconds", absl::ToDoubleSeconds(session.age)},
          {"lease_seconds", absl::ToDoubleSeconds(session.lease_left)},
          {"basis_drift_ratio", session.basis_drift_ratio}};
}

std::string FormatProfile(const ProfileSummary& profile) {
  const ModelShape& model = profile.model;
  const auto heads = static_cast<size_t>(model.num_kv_heads);
  const auto range = [heads](const std::vector<float>& factors, size_t layer) {
    const auto [least, most] =
        std::minmax_element(factors.begin() + layer * heads, factors.begin() + (layer + 1) * heads);
    return absl::StrFormat("%.2f to %.2f", *least, *most);
  };
  std::vector<std::vector<std::string>> rows = {
      {"layer", "audits a kv head", "error factors", "audits say"}};
  for (size_t layer = 0; layer < static_cast<size_t>(model.num_layers); ++layer) {
    const auto first = profile.audits.begin() + layer * heads;
    rows.push_back({absl::StrCat(layer), absl::StrCat(*std::min_element(first, first + heads)),
                    range(profile.error_factors, layer),
                    range(profile.audited_error_factors, layer)});
  }
  return absl::StrCat(ShapeOf(model), ", ", profile.has_basis ? "with" : "without", " bases, ",
                      profile.has_policy ? "with" : "without", " a policy, ",
                      FormatBytes(static_cast<double>(profile.bytes)), "\n", FormatTable(rows));
}

nlohmann::ordered_json ToJson(const ProfileSummary& profile) {
  return {{"num_layers", profile.model.num_layers},
          {"num_q_heads", profile.model.num_q_heads},
          {"num_kv_heads", profile.model.num_kv_heads},
          {"head_dim", profile.model.head_dim},
          {"bytes", profile.bytes},
          {"has_basis", profile.has_basis},
          {"has_policy", profile.has_policy},
          {"error_factors", profile.error_factors},
          {"audits", profile.audits},
          {"audited_error_factors", profile.audited_error_factors}};
}

std::string FormatReplays(absl::Span<const ReplayReport> reports) {
  std::vector<std::vector<std::string>> accuracy = {
      {"trace", "mode", "theta", "error mean", "error p99", "lse max", "bytes read", "of bf16",
       "+ basis", "k bits", "v bits", "rank", "skipped"}};
  std::vector<std::vector<std::string>> latency = {{"p50/p99 us", "mode", "end to end", "p99"}};
  for (const char* stage : kStageNames) latency[0].insert(latency[0].end(), {stage, "p99"});
  for (const ReplayReport& r : reports) {
    accuracy.push_back(
        {r.trace, r.mode, r.has_theta ? absl::StrFormat("%.4g", r.theta) : "-",
         absl::StrFormat("%.2e", r.relative_error_mean),
         absl::StrFormat("%.2e", r.relative_error_p99), absl::StrFormat("%.2e", r.lse_error_max),
         FormatBytes(static_cast<double>(r.bytes_read)),
         absl::StrFormat("%.1f%%", 100 * r.bytes_fraction),
         absl::StrFormat("%.1f%%", 100.0 * r.basis_bytes / std::max<int64_t>(1, r.bytes_bf16)),
         absl::StrFormat("%.2f", r.mean_key_bits), absl::StrFormat("%.2f", r.mean_value_bits),
         absl::StrFormat("%.1f", r.mean_rank),
         absl::StrFormat("%.1f%%", 100 * r.pages_skipped_fraction)});
    std::vector<std::string> times = {r.trace, r.mode, absl::StrFormat("%.0f", r.latency_us.p50),
                                      absl::StrFormat("%.0f", r.latency_us.p99)};
    for (const Quantiles& stage : r.stage_us) {
      times.push_back(absl::StrFormat("%.0f", stage.p50));
      times.push_back(absl::StrFormat("%.0f", stage.p99));
    }
    latency.push_back(std::move(times));
  }
  return absl::StrCat(FormatTable(accuracy), "\n", FormatTable(latency));
}

nlohmann::ordered_json ToReportJson(const ReplayReport& report) {
  nlohmann::ordered_json theta;
  // Six digits: thetas travel as floats.
  if (report.has_theta) theta = std::stod(absl::StrFormat("%.6g", report.theta));
  return {{"trace", report.trace},
          {"mode", report.mode},
          {"theta", theta},
          {"relative_error_mean", report.relative_error_mean},
          {"relative_error_p99", report.relative_error_p99},
          {"lse_error_max", report.lse_error_max},
          {"bytes_read", report.bytes_read},
          {"bytes_bf16", report.bytes_bf16},
          {"bytes_fraction", report.bytes_fraction},
          {"mean_key_bits", report.mean_key_bits},
          {"mean_value_bits", report.mean_value_bits},
          {"mean_rank", report.mean_rank},
          {"latency_us", ToJson(report.latency_us)}};
}

nlohmann::ordered_json ToJson(const ReplayReport& report) {
  nlohmann::ordered_json json = ToReportJson(report);
  json["steps"] = report.steps;
  json["bytes_fraction_steps"] = report.bytes_fraction_steps;
  json["basis_bytes"] = report.basis_bytes;
  json["predicted_error_mean"] = report.predicted_error_mean;
  json["pages_skipped_fraction"] = report.pages_skipped_fraction;
  for (int i = 0; i < kNumStages; ++i) {
    json["stage_us"][kStageNames[i]] = ToJson(report.stage_us[i]);
  }
  return json;
}

std::string PrintedReplays(absl::Span<const ReplayReport> reports, bool json) {
  if (!json) return FormatReplays(reports);
  nlohmann::ordered_json runs = nlohmann::ordered_json::array();
  for (const ReplayReport& report : reports) runs.push_back(ToJson(report));
  return nlohmann::ordered_json({{"runs", runs}}).dump(2) + "\n";
}

}  // namespace adaattn::client
